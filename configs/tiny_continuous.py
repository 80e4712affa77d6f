# python factorize.py configs/tiny_continuous.py
# about 20 seconds: every stage of the continuous recipe, too short to be good
base = "configs/tiny_base.py"
n_latents = 3
z_dim = 2
steps = 60
batch_size = 32
pool_size = 128
cluster_inputs = 48
cluster_responses = 8
cell_steps = 40
eval_every = 20
eval_inputs = 32
