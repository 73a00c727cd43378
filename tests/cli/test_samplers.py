"""The list of samplers on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdiffusion import Sampler, Spacing, cli
from kdiffusion.sampling.samplers import SAMPLERS, make_table
from kdiffusion.sampling.schedule import Schedule

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def samplers(*arguments):
    return cli.main(["samplers", *arguments])


def test_samplers_are_listed_each_with_its_options(capsys):
    assert samplers() == cli.OK
    printed = capsys.readouterr().out
    head, *rows = printed.split("\n\n")[0].splitlines()
    assert "\nlms           Euler with a memory of earlier calls" in printed
    assert head.split() == "name label orders eta calls noise spacings".split()
    assert [row.split()[0] for row in rows] == list(SAMPLERS)
    columns = [head.index(word) for word in head.split()] + [None]
    table = {
        row.split()[0]: [row[start:stop].strip() for start, stop in zip(columns, columns[1:])]
        for row in rows
    }
    both = "timesteps, sigmas"
    assert table["ddim"] == ["ddim", "DDIM", "-", "0", "1", "no", "timesteps"]
    assert table["unipc"][2:] == ["1 to 3, default 2", "-", "1", "no", both]
    assert table["dpm2_a"] == ["dpm2_a", "DPM2 a", "-", "1", "2", "yes", both]
    assert table["tcd"][2:] == ["-", "0.3", "1", "yes", "its own"]
    assert [name for name in table if table[name][4] == "2"] == [
        *("heun", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde")
    ]


def test_samplers_as_json_can_be_chosen_from(capsys):
    assert samplers("--json") == cli.OK
    records = json.loads(capsys.readouterr().out)
    labels = {name: record.label for name, record in SAMPLERS.items()}
    assert {record["name"]: record["label"] for record in records} == labels
    assert samplers("--json", "--sampler", "lms", "lcm") == cli.OK
    lms, lcm = json.loads(capsys.readouterr().out)
    assert lms == {
        "name": "lms",
        "label": "LMS",
        "description": "Euler with a memory of earlier calls; 30 to 50 steps.",
        "orders": [1, 2, 3, 4],
        "order": 4,
        "eta": None,
        "network_calls": 1,
        "fresh_noise": False,
        "timestep_spacings": ["leading", "trailing", "linspace"],
        "sigma_spacings": ["karras", "exponential", "beta"],
    }
    assert (lcm["timestep_spacings"], lcm["sigma_spacings"]) == ([], [])


def test_what_is_listed_of_a_sampler_is_what_it_takes(capsys):
    assert samplers("--json") == cli.OK
    for record in json.loads(capsys.readouterr().out):
        name = record["name"]
        assert record["description"].endswith(".") and len(record["description"]) < 80
        for order in record["orders"]:
            assert Sampler(name, order=order)
        with pytest.raises(ValueError, match="order"):
            Sampler(name, order=len(record["orders"]) + 1)
        for sigmas in ("karras", "exponential", "beta"):
            if sigmas in record["sigma_spacings"]:
                make_table(name, Schedule(), 5, Spacing(sigmas=sigmas))
                continue
            with pytest.raises(ValueError, match="takes no sigma spacing"):
                make_table(name, Schedule(), 5, Spacing(sigmas=sigmas))


def test_unknown_sampler_lists_the_known(capsys):
    assert samplers("--sampler", "eulre") == cli.FAILED
    assert "'eulre'. Use one of ['ddim', 'ddpm'" in capsys.readouterr().err


def test_samplers_are_plotted_to_a_file_that_is_not_overwritten(capsys, monkeypatch):
    asked = []

    def stand_in(path, *settings):
        asked.append(settings)
        path.write_text("a plot")

    monkeypatch.setattr("kdiffusion.sampling.plots.plot_samplers", stand_in)
    assert samplers("--plot", "samplers.png") == cli.OK
    options = ["--sampler", "heun", "lms", "--steps", "5", "--spacing", "karras"]
    assert samplers("--plot", "samplers.png", *options) == cli.FAILED
    assert samplers("--plot", "samplers.png", *options, "--force") == cli.OK
    out, err = capsys.readouterr()
    assert out == "samplers.png\n" * 2
    assert "samplers.png exists already; overwrite with --force" in err
    assert asked == [
        (list(SAMPLERS), 20, Spacing()),
        (["heun", "lms"], 5, Spacing(sigmas="karras")),
    ]
    assert samplers("--plot", "samplers.pdf") == cli.FAILED
    assert samplers("--plot", "nowhere/samplers.png") == cli.FAILED


def test_listing_the_samplers_imports_no_framework():
    code = (
        "import sys\nfrom kdiffusion.cli import main\nmain(['samplers'])\n"
        "heavy = {'keras', 'tensorflow', 'jax'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
