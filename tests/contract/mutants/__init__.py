"""Proof that the gates can fail: defects put into the running application, each with the gate that finds it."""
