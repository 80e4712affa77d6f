# python factorize.py configs/summation_worded_discrete.py
base = "configs/summation_worded_base.py"
n_latents = 3
