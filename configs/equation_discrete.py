# python factorize.py configs/equation_discrete.py
base = "configs/equation_base.py"
n_latents = 3
