# python factorize.py configs/equation_missing_discrete.py
base = "configs/equation_missing_base.py"
n_latents = 3
