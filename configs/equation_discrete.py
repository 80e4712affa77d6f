base = "configs/equation_base.py"
