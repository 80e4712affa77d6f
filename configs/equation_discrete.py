# python factorize.py configs/equation_discrete.py
base = "configs/equation_base.py"
