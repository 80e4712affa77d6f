# python factorize.py configs/equation_continuous.py
base = "configs/equation_base.py"
z_dim = 4
