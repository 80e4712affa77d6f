# python factorize.py configs/addition_continuous.py
base = "configs/addition_base.py"
z_dim = 4
