"""Can this run learn, and if it went wrong: why, and which flag helps?

`facts` holds what is known of a run, `rules` the table of symptoms, `diagnosis` what follows from both; `preflight` and
`targets` find facts out: of a model before its first step, and of any record of a run, whoever made it.
"""
