"""Every public class has an example in its docstring, and the examples do what they show."""

import doctest
import inspect
import re

import av
import numpy as np
import pytest

import dmgal_hf
from dmgal_hf import data, peft

PUBLIC = {
    name: member
    for module in (dmgal_hf, data, peft)
    for name in module.__all__
    if inspect.isclass(member := getattr(module, name))
}


@pytest.fixture(autouse=True)
def clips(tmp_path, monkeypatch):
    """The examples run in a folder with four short clips."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in "abcd":
        with av.open(f"{name}.mp4", "w") as container:
            stream = container.add_stream("libx264", rate=10, width=96, height=80, pix_fmt="yuv420p")
            for picture in generator.integers(256, size=(12, 80, 96, 3), dtype=np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_example(name):
    # A fence would be taken for a line of what is printed.
    text = re.sub(r"^\s*```.*$", "", inspect.getdoc(PUBLIC[name]) or "", flags=re.MULTILINE)
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert example.examples, f"the docstring of {name} has no example"
    printed = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=printed.append)
    assert runner.failures == 0, "".join(printed)
