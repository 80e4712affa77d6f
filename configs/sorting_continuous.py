# python factorize.py configs/sorting_continuous.py
base = "configs/sorting_base.py"
z_dim = 4
steps = 1400
cell_steps = 1200
