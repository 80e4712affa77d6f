# python factorize.py configs/summation_continuous.py
base = "configs/summation_base.py"
z_dim = 4
