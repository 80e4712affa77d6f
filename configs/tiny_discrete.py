# python factorize.py configs/tiny_discrete.py
# about 20 seconds, base included: every stage of the recipe, too short to be good
base = "configs/tiny_base.py"
n_latents = 3
steps = 60
batch_size = 32
pool_size = 128
cluster_inputs = 48
cluster_responses = 8
fixed_label_steps = 20
responsibility_steps = 20
eval_every = 20
eval_inputs = 32
eval_samples = 4
