# python factorize.py configs/grid_continuous.py
base = "configs/grid_base.py"
z_dim = 4
