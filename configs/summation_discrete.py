base = "configs/summation_base.py"
