"""Whatever people type and bring: every command, with ordinary and with impossible input.

entries   the commands, and where all checks of each are behind   bring   files and folders
values    what is typed, and what can never be right              made    what commands have made
cases     what is drawn for one case                              children   one case, judged
"""
