"""Watch responses while a language model learns: what each step did to them, and what first order said it would do.

A `Tracker` is given a model, responses to watch (`Probe`), and the steps of any optimiser. At every k-th step it
measures log π(y | x) of each response before and after the step and predicts the change to first order: A J Δθ at
the response's tokens, summed, with the step Δθ = θ_after − θ_before that was really taken. For plain gradient descent
this is −η A K G, and for any other optimiser the same with its own preconditioner, momentum and weight decay (see
`ldyn.dynamics.sequences.predicted_change_along`). What gradient clipping, accumulation or schedules do to the step is
in Δθ too. The rows go to a plain CSV file as they come, so that a run which is killed loses at most its last record
and can be continued. Derived and used in the chapter `book/dynamics/tracking.md`.
"""

from ldyn.dynamics._probes import Probe, greedy_response
from ldyn.dynamics._records import Record, read_records
from ldyn.dynamics._tracker import Tracker
from ldyn.dynamics._tracking_callback import tracking_callback
from ldyn.dynamics._tracking_plot import plot_records

__all__ = ["Probe", "Record", "Tracker", "greedy_response", "plot_records", "read_records", "tracking_callback"]
