"""Every sampler against its reference: `python tests/acceptance/sampler_parity.py`.

Runs each table beside diffusers (k-diffusion's and ComfyUI's formulas where diffusers has none, or
none to follow) on a nonlinear toy network with the same noise, and compares x after every network
call. Prints what ran, what was left out and where the reference is departed from; exits with 1 if
anything differs by more than its bar, or too little ran.
"""

import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))

import reference_samplers as reference  # noqa: E402

FEWEST_COMBINATIONS = 200


def main():
    warnings.simplefilter("ignore")
    began, total, failures = time.perf_counter(), 0, []
    print(f"{'sampler':<14} {'combinations':>12} {'largest error':>14}")
    for name, cases in groups():
        worst = 0.0
        for count, case in enumerate(cases, start=1):
            error = reference.largest_error(case)
            worst = max(worst, error)
            if not error < reference.tolerance(case):
                failures.append(f"{case}: {error:.2e}")
        total += count
        print(f"{name:<14} {count:>12} {worst:>14.1e}", flush=True)
    for name, errors in further_checks().items():
        total += len(errors)
        print(f"{name:<50} {len(errors):>3} {max(errors):.1e}")
        failures += [f"{name}: {error:.2e}" for error in errors if not error < 1e-9]
    print_list("Left out", reference.LEFT_OUT)
    print_list("Reference defects departed from", reference.DEFECTS)
    print_list("FAILED", failures)
    print(f"\n{total} combinations in {time.perf_counter() - began:.0f} s, {len(failures)} failed")
    return 1 if failures or total < FEWEST_COMBINATIONS else 0


def groups():
    for name in reference.REFERENCE:
        yield name, reference.grid(name)
    yield "zero SNR", reference.zero_terminal_snr_grid()
    yield "image_to_image", reference.image_to_image_grid()


def further_checks():
    third_order = [
        reference.error_of_3m_without_noise(
            reference.Case(reference.Sampler("dpmpp_3m_sde"), num_steps, timesteps, sigmas)
        )
        for num_steps in reference.STEPS
        for timesteps in reference.TIMESTEP_SPACINGS
        for sigmas in reference.SIGMA_SPACINGS
    ]
    own_schedule = [
        reference.error_of_ipndm_on_its_own_schedule(num_steps) for num_steps in (2, 5, 20, 50)
    ]
    return {
        "dpmpp_3m_sde at eta 0, diffusers' order 3": third_order,
        "ipndm on diffusers' own schedule": own_schedule,
    }


def print_list(title, lines):
    if lines:
        print(f"\n{title}:")
    for line in lines:
        print(f"- {line}")


if __name__ == "__main__":
    sys.exit(main())
