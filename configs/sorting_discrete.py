# python factorize.py configs/sorting_discrete.py
base = "configs/sorting_base.py"
steps = 750
held_steps = 500
responsibility_steps = 200
