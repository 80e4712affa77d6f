# python factorize.py configs/addition_continuous.py
base = "configs/addition_base.py"
n_latents = 3
z_dim = 4
batch_size = 64
