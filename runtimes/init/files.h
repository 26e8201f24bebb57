/* The file worker; see files.c. */

#ifndef SANDBOX_FILES_H
#define SANDBOX_FILES_H

/* Serves files_wire.py's protocol on a socket until its other end is closed, then ends the process. `proc_fd` is an
 * open /proc. */
_Noreturn void serve_files(int socket_fd, int proc_fd);

#endif
