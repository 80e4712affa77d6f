# python factorize.py configs/base_conversion_discrete.py
base = "configs/base_conversion_base.py"
n_latents = 3
