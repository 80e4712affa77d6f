# python train_base.py configs/summation_worded_base.py
# steps end in ; or , and their addends come in either order: up to 2^6 or 2^8 wordings of a trace
task = "list_summation"
wordings = ["separators", "operands"]
