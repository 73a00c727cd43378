"""Fixtures that all tests share, which tests need a Keras backend, and which are slow."""

import os
import re
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

import kdiffusion  # before Keras, which loads TensorFlow: see there

HERE = Path(__file__).parent

# Folders whose tests compute with Keras. Elsewhere a file says so by its `pytestmark`, or a test by
# its mark.
BACKEND = [
    HERE / name
    for name in ("runtime", "models", "weights", "pipelines", "training", "evaluation", "shapes")
]

# Seconds of a processor that a test of its own may take, without its fixtures: longer ones are
# listed, and fail where no slow or busy machine is an excuse. A tight bar would make them fail by
# chance. Those that cannot be short are marked as `slow`, up to so many.
TOO_LONG, FAR_TOO_LONG, MOST_SLOW = 5, 180, 40

_COMPILE_CACHE = pytest.StashKey[str]()


def pytest_configure(config):
    """Share what this run compiles among its workers and their children, and obey Ctrl-C.

    A folder that the environment names is shared by several runs.
    """
    # In the background of a shell SIGINT is ignored, here and in all children.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "KDIFFUSION_COMPILE_CACHE" not in os.environ:
        folder = tempfile.mkdtemp(prefix="kdiffusion-tests-")
        config.stash[_COMPILE_CACHE] = os.environ["KDIFFUSION_COMPILE_CACHE"] = folder
    if os.environ["KDIFFUSION_COMPILE_CACHE"] != "off":
        # JAX keeps what took a second to compile; tests compile much that takes less.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_unconfigure(config):
    """Remove the folder of compiled programs."""
    if folder := config.stash.get(_COMPILE_CACHE, None):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_ignore_collect(collection_path, config):
    """Do not even import what would be deselected: Keras may have no backend then."""
    if config.option.markexpr == "not backend" and _needs_backend(collection_path):
        return True


def _needs_backend(path):
    if path.suffix != ".py":
        return path in BACKEND
    marked = r"^pytestmark = \[?\s*pytest\.mark\.backend\b"
    return re.search(marked, path.read_text("utf-8"), re.MULTILINE)


def pytest_collection_modifyitems(items):
    """Mark the tests that need a Keras backend, and count those that are marked as slow."""
    for item in items:
        if any(folder in BACKEND for folder in item.path.parents):
            item.add_marker(pytest.mark.backend)
    slow = sum(item.get_closest_marker("slow") is not None for item in items)
    if slow > MOST_SLOW:
        raise pytest.UsageError(f"At most {MOST_SLOW} tests may be `slow`. Found: {slow}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a test that takes far too long, and note the seconds of each."""
    start = _processor_seconds()
    result = yield
    seconds = _processor_seconds() - start
    if item.get_closest_marker("slow") is None:
        item.user_properties.append(("processor seconds", seconds))
        if seconds > FAR_TOO_LONG:
            pytest.fail(f"{seconds:.0f} s of a processor: share, shrink, or mark it as `slow`")
    return result


def _processor_seconds():
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def pytest_terminal_summary(terminalreporter):
    """List the tests that take too long and are not marked as slow."""
    found = {
        report.nodeid: value
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "processor seconds" and value > TOO_LONG
    }
    if found:
        terminalreporter.section(f"more than {TOO_LONG} s of a processor, and not marked `slow`")
    for name, seconds in sorted(found.items(), key=lambda pair: -pair[1]):
        terminalreporter.line(f"{seconds:6.1f} s {name}")


@pytest.fixture(scope="session")
def tiny():
    """`random-tiny` as a plain graph where there is one; do not change it."""
    from kdiffusion import StableDiffusion

    return StableDiffusion.from_preset("random-tiny", jit_compile=False)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A stand-in for the model, in an empty folder, with the user's environment put back."""
    from cli_stand_in import StandIn, chosen_sampling

    from kdiffusion.cli import generate

    class Fresh(StandIn):
        asked: dict = {}

    monkeypatch.setitem(vars(kdiffusion), "open_model", Fresh.from_preset)
    monkeypatch.setattr(generate, "_sampling", chosen_sampling)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"))
    monkeypatch.chdir(tmp_path)
    return Fresh
