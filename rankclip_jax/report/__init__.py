"""One self-contained page about one run or several, drawn from what training and --mode=eval left in their workdirs."""
