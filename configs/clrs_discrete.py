# python factorize.py configs/clrs_discrete.py
base = "configs/clrs_base.py"
n_latents = 4
steps = 1700
fixed_label_steps = 600
responsibility_steps = 1060
