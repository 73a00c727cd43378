"""k-diffusion's and ComfyUI's formulas as plain loops, for samplers that diffusers has not.

They run on x / a = z + sigma * noise, with the sigmas that diffusers would give them.
"""

import math

import diffusers
import numpy as np
from reference_diffusers import make_scheduler, network

from kdiffusion.sampling.samplers import Sampler


def _sigma_levels(case):
    """Levels of the schedulers of diffusers that these samplers would take them from."""
    like = "dpmpp_2m" if case.sampler.name.startswith("dpmpp_3m") else "euler"
    scheduler = make_scheduler(case._replace(sampler=Sampler(like)))
    scheduler.set_timesteps(case.num_steps)
    return scheduler.sigmas.numpy(), scheduler.timesteps.numpy(), scheduler


def _denoise(case, x, sigma, timestep):
    scale = 1.0 / math.sqrt(1.0 + sigma**2)
    output = network(scale * x, timestep)
    if case.prediction == "epsilon":
        return x - sigma * output
    if case.prediction == "v":
        return scale**2 * x - sigma * scale * output
    return output


def _timestep(case, sigma):
    sigmas = case.schedule().sigmas
    return np.interp(np.log(sigma), np.log(sigmas), np.arange(1000.0))


def _start(case, scheduler, drawn):
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):
        return drawn[-1] * math.sqrt(1.0 + float(scheduler.sigmas[0]) ** 2)
    return drawn[-1] * float(scheduler.init_noise_sigma)


def _ancestral_step(sigma, sigma_to, eta):
    up = min(sigma_to, eta * math.sqrt(sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2))
    return math.sqrt(sigma_to**2 - up**2), up


def run_dpmpp_sde(case, drawn, landing):
    """k-diffusion, sample_dpmpp_sde at r = 1/2, noise from one Brownian path in sigma."""
    sigmas, timesteps, scheduler = _sigma_levels(case)
    eta = case.sampler.options["eta"]
    x, states = _start(case, scheduler, drawn), []
    for i, timestep in enumerate(timesteps):
        sigma, sigma_to = sigmas[i], sigmas[i + 1]
        denoised = _denoise(case, x, sigma, timestep)
        if sigma_to == 0.0 or math.isclose(sigma, sigma_to):
            states.append(x + (x - denoised) / sigma * (sigma_to - sigma))
            x = states[-1]
            continue
        middle = math.exp((math.log(sigma) + math.log(sigma_to)) / 2)
        first, second = drawn[len(states)], drawn[len(states) + 1]
        # The path's increments to the middle and over the rest of the step, then over all of it.
        to_middle, rest = math.sqrt(sigma - middle) * first, math.sqrt(middle - sigma_to) * second
        down, up = _ancestral_step(sigma, middle, eta)
        inner = down / sigma * x - math.expm1(math.log(down / sigma)) * denoised + up * first
        states.append(inner)
        denoised = _denoise(case, inner, middle, _timestep(case, middle))
        down, up = _ancestral_step(sigma, sigma_to, eta)
        x = down / sigma * x - math.expm1(math.log(down / sigma)) * denoised
        x = x + up * (to_middle + rest) / math.sqrt(sigma - sigma_to)
        states.append(x)
    return [a * x for (a, _), x in zip(landing, states)]


def run_dpmpp_2s_a(case, drawn, landing):
    """k-diffusion, sample_dpmpp_2s_ancestral: in t = -log(sigma)."""
    sigmas, timesteps, scheduler = _sigma_levels(case)
    eta = case.sampler.options["eta"]
    x, states = _start(case, scheduler, drawn), []
    for i, timestep in enumerate(timesteps):
        sigma, sigma_to = sigmas[i], sigmas[i + 1]
        denoised = _denoise(case, x, sigma, timestep)
        down, up = _ancestral_step(sigma, sigma_to, eta)
        if down == 0.0:
            x = x + (x - denoised) / sigma * (down - sigma)
            states.append(x)
            continue
        length = math.log(sigma) - math.log(down)
        middle = math.exp(math.log(sigma) - length / 2)
        inner = middle / sigma * x - math.expm1(-length / 2) * denoised
        states.append(inner)
        denoised = _denoise(case, inner, middle, _timestep(case, middle))
        x = down / sigma * x - math.expm1(-length) * denoised + drawn[len(states)] * up
        states.append(x)
    return [a * x for (a, _), x in zip(landing, states)]


def run_dpmpp_3m_sde(case, drawn, landing):
    """k-diffusion, sample_dpmpp_3m_sde."""
    sigmas, timesteps, scheduler = _sigma_levels(case)
    eta = case.sampler.options["eta"]
    x, states, known, lengths = _start(case, scheduler, drawn), [], [], []
    for i, timestep in enumerate(timesteps):
        sigma, sigma_to = sigmas[i], sigmas[i + 1]
        denoised = _denoise(case, x, sigma, timestep)
        if sigma_to == 0.0:
            states.append(denoised)
            break
        h = math.log(sigma / sigma_to)
        h_eta = h * (eta + 1)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        if math.isclose(sigma, sigma_to):
            states.append(x)
            break
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        if len(known) == 1:
            x = x + phi_2 * (denoised - known[-1]) / (lengths[-1] / h)
        if len(known) > 1:
            r0, r1 = lengths[-1] / h, lengths[-2] / h
            d1_0, d1_1 = (denoised - known[-1]) / r0, (known[-1] - known[-2]) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
        x = x + drawn[i] * sigma_to * math.sqrt(-math.expm1(-2 * h * eta))
        known.append(denoised)
        lengths.append(h)
        states.append(x)
    return [a * x for (a, _), x in zip(landing, states)]


def run_ipndm(case, drawn, landing):
    """ComfyUI, sample_ipndm: constant Adams-Bashforth weights, an Euler step at the end."""
    sigmas, timesteps, scheduler = _sigma_levels(case)
    constants = [
        [1.0],
        [1.5, -0.5],
        [23 / 12, -16 / 12, 5 / 12],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ]
    x, states, slopes = _start(case, scheduler, drawn), [], []
    for i, timestep in enumerate(timesteps):
        slopes.insert(0, (x - _denoise(case, x, sigmas[i], timestep)) / sigmas[i])
        order = 1 if sigmas[i + 1] == 0.0 else min(case.sampler.options["order"], len(slopes))
        slope = sum(c * d for c, d in zip(constants[order - 1], slopes))
        x = x + (sigmas[i + 1] - sigmas[i]) * slope
        states.append(x)
    return [a * x for (a, _), x in zip(landing, states)]
