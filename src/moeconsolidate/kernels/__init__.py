"""The compiler's inner loops, compiled by numba: comparing experts and choosing nested codes.

Each function here is one thread's work on plain arrays and lets go of the interpreter, so that
`moeconsolidate.threads` decides what runs side by side. What decides a byte of a pack is neither
reassociated nor contracted: a sum has the order that its loop says, on any machine.

Importing any of these modules loads numba, so who needs them imports them late.
"""
