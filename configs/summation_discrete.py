# python factorize.py configs/summation_discrete.py
base = "configs/summation_base.py"
n_latents = 3
