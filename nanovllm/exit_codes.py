"""What the exit codes of our processes mean, beside 0 and 1."""

# A command that Ctrl-C has ended, as shells count it.
EXIT_INTERRUPTED = 130
# A service that its options keep from running: a restart would not help.
EXIT_MISCONFIGURED = 2
# A service that ends because another has ended.
EXIT_FOLLOWED = 3
