"""The mathematics of diffusion: noise schedules, denoisers, guidance, noise and samplers.

No networks, files or prompts: functions receive tensors and callables as arguments.
"""
