"""How fast is each op, the step, the training, generation; against whom; how far from the limit.

One file per question; `python -m bench --help` lists them. Imported by nobody.
"""
