# python factorize.py configs/grid_routed_discrete.py
base = "configs/grid_routed_base.py"
n_latents = 3
steps = 1400  # the router has more to learn than equal shares
fixed_label_steps = 600
responsibility_steps = 760
