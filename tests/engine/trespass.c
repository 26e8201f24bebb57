/*
 * Tries one thing that a sandbox must not be able to do, and prints "ok" or the name of the errno:
 *
 *     trespass connect NAME   connect to a Unix socket; "@" at the beginning stands for an abstract one
 *     trespass trace PID      attach to a process
 *     trespass become         print the effective uid, which a setuid bit would change
 *
 * Build: gcc -static -O2 -Wall -Wextra -Werror -o trespass trespass.c
 */

#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void report(long result)
{
	puts(result >= 0 ? "ok" : strerrorname_np(errno));
}

static int reach(const char *name)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	static const int types[] = { SOCK_STREAM, SOCK_SEQPACKET, SOCK_DGRAM };
	size_t length = strlen(name);
	if (length >= sizeof(address.sun_path)) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(address.sun_path, name, length);
	if (name[0] == '@')
		address.sun_path[0] = '\0';
	for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
		int fd = socket(AF_UNIX, types[i], 0);
		if (fd < 0)
			return -1;
		if (connect(fd, (struct sockaddr *)&address,
			    (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length)) == 0)
			return fd;
		if (errno != EPROTOTYPE)
			return -1;
		close(fd);
	}
	return -1;
}

int main(int argc, char **argv)
{
	if (argc == 3 && strcmp(argv[1], "connect") == 0)
		report(reach(argv[2]));
	else if (argc == 3 && strcmp(argv[1], "trace") == 0)
		report(ptrace(PTRACE_ATTACH, atoi(argv[2]), NULL, NULL));
	else if (argc == 2 && strcmp(argv[1], "become") == 0)
		printf("%d\n", (int)geteuid());
	else
		return 2;
	return 0;
}
