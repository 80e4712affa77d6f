# python factorize.py configs/sorting_discrete.py
base = "configs/sorting_base.py"
steps = 700
responsibility_steps = 500
