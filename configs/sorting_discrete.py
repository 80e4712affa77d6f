base = "configs/sorting_base.py"
