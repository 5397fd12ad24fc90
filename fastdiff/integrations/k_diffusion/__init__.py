"""k-diffusion's samplers by fastdiff's rows: ``sample_euler(model, x, sigmas)`` and the others.

    from fastdiff.integrations import k_diffusion as K

    x = K.sample_dpmpp_2m(model, x, sigmas)

Names, arguments and results are those of ``k_diffusion.sampling`` (github.com/crowsonkb/
k-diffusion), whose model answers x_0 to x = x_0 + σ·ε. Each takes one fused ``posterior_step`` a
call of the model. What differs:

- ``sigmas`` fall strictly, to 0 or to the level at which x is wanted, and churn leads to none above
  the first;
- by default the noise of the samplers whose k-diffusion's is a Brownian tree is the same in
  distribution, drawn by ``torch.randn_like`` and without torchsde;
- ``eta`` of ancestral samplers is at most 1, ``order`` of ``sample_lms`` at most 4, and ``r`` of
  ``sample_dpmpp_sde`` is ½;
- ``accept_safety`` of ``sample_dpm_adaptive`` is at most 1, and it raises where it would not end.

x is float32, bfloat16 or float16; the arithmetic is float32. Bad arguments are an InputError.
"""

from fastdiff.integrations.k_diffusion.dpm_solver import sample_dpm_adaptive, sample_dpm_fast
from fastdiff.integrations.k_diffusion.on_sigmas import (
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
)

__all__ = [
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
]
