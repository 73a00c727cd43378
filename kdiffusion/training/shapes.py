"""Run `python -m kdiffusion.shapes` under its former name, for one release."""

import runpy

if __name__ == "__main__":
    runpy.run_module("kdiffusion.shapes", run_name="__main__")
