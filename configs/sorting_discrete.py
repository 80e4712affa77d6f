# python factorize.py configs/sorting_discrete.py
base = "configs/sorting_base.py"
n_latents = 5
steps = 1700
fixed_label_steps = 600
responsibility_steps = 1060
