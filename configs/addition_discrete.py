# python factorize.py configs/addition_discrete.py
base = "configs/addition_base.py"
n_latents = 3
