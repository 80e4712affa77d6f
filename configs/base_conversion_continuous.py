# python factorize.py configs/base_conversion_continuous.py
base = "configs/base_conversion_base.py"
n_latents = 3
z_dim = 4
batch_size = 64
