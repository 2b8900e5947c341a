"""The same numbers, sooner: the step of `training/stage.py`, each saving in a file of its own."""
