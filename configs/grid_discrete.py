base = "configs/grid_base.py"
