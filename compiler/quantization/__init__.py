"""int8: what is measured once on the original (`calibrate`), what a backend gets (`layers`), which layers it is (`search`)."""
