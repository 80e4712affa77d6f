# python factorize.py configs/grid_skew_discrete.py
base = "configs/grid_skew_base.py"
prior = [0.6, 0.3, 0.1]
