# python factorize.py configs/clrs_discrete.py
base = "configs/clrs_base.py"
n_latents = 4
