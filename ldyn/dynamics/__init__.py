"""How one step of training changes predictions: one module for each chapter of the part *Dynamics*."""
