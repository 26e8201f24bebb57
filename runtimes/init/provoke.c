/*
 * sandbox-provoke: runs into one limit on purpose, to see whether it holds.
 *
 *     sandbox-provoke memory BYTES        touch memory until killed, or until BYTES are held
 *     sandbox-provoke pids N              fork until refused, or until N children live
 *     sandbox-provoke cpu SECONDS PROCS   spin in PROCS processes for SECONDS
 *
 * A static program, bound read-only into every sandbox beside sandbox-init, for an image may have no shell and no
 * libc. Whether the limit held is judged outside, by the control group's own counters; what is said here is how it
 * looked from inside:
 *
 *     exit 0   the limit was met (pids: fork was refused with EAGAIN) or the time is over (cpu)
 *     exit 2   usage
 *     exit 3   not held: everything that was asked for was got
 *     exit 4   could not be tried: something else stood in the way, named on stderr
 *
 * "memory" ends by SIGKILL where the limit holds. It makes itself the kernel's first choice, so that no other process
 * of the sandbox dies for it. Children carry a parent-death signal: none outlives the program, however it ends.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MET = 0, USAGE = 2, NOT_HELD = 3, NOT_TRIED = 4 };

#define CHUNK_BYTES ((size_t)1024 * 1024)
#define CHILDREN_MAX 4194304L /* the largest kernel.pid_max */
#define SECONDS_MAX 60L
#define PROCS_MAX 8192L

static int not_tried(const char *what)
{
	fprintf(stderr, "sandbox-provoke: cannot try: %s: %s\n", what, strerror(errno));
	return NOT_TRIED;
}

/* A whole decimal number from 1 to max, or -1. */
static long number(const char *text, long max)
{
	char *end = NULL;
	if (text[0] < '0' || text[0] > '9')
		return -1;
	errno = 0;
	long value = strtol(text, &end, 10);
	if (errno != 0 || *end != '\0' || value < 1 || value > max)
		return -1;
	return value;
}

/* Dies with its parent, also with one that died before this call. */
static void die_with(pid_t parent)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent)
		_exit(NOT_TRIED);
}

static int kill_and_reap(const pid_t *children, long count, int status)
{
	for (long i = 0; i < count; i++)
		kill(children[i], SIGKILL);
	for (long i = 0; i < count; i++)
		while (waitpid(children[i], NULL, 0) < 0 && errno == EINTR)
			;
	return status;
}

static void be_first_choice(void)
{
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (write(fd, "1000", 4) < 0)
		perror("sandbox-provoke: oom_score_adj");
	close(fd);
}

static int provoke_memory(size_t bytes)
{
	be_first_choice();
	long page = sysconf(_SC_PAGESIZE);
	if (page <= 0)
		return not_tried("page size");
	for (size_t held = 0; held < bytes; held += CHUNK_BYTES) {
		void *chunk = mmap(NULL, CHUNK_BYTES, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (chunk == MAP_FAILED)
			return not_tried("mmap");
		volatile unsigned char *start = chunk;
		/* Not zero, and no two pages alike: neither may be shared or compressed to nothing. */
		for (size_t at = 0; at < CHUNK_BYTES; at += (size_t)page) {
			size_t mark = held + at + 1;
			memcpy((void *)(start + at), &mark, sizeof mark);
		}
	}
	printf("%zu\n", bytes);
	return NOT_HELD;
}

static int provoke_pids(long wanted)
{
	pid_t parent = getpid();
	pid_t *children = calloc((size_t)wanted, sizeof *children);
	if (children == NULL)
		return not_tried("calloc");
	for (long count = 0; count < wanted; count++) {
		pid_t child = fork();
		if (child == 0) {
			die_with(parent);
			for (;;)
				pause();
		}
		if (child < 0) {
			int status = errno == EAGAIN ? MET : not_tried("fork");
			printf("%ld\n", count);
			return kill_and_reap(children, count, status);
		}
		children[count] = child;
	}
	printf("%ld\n", wanted);
	return kill_and_reap(children, wanted, NOT_HELD);
}

static void spin(void)
{
	for (volatile unsigned long turns = 0;; turns++)
		;
}

static int provoke_cpu(long seconds, long procs)
{
	pid_t parent = getpid();
	pid_t *children = calloc((size_t)procs, sizeof *children);
	if (children == NULL)
		return not_tried("calloc");
	for (long count = 0; count < procs; count++) {
		pid_t child = fork();
		if (child == 0) {
			die_with(parent);
			spin();
		}
		if (child < 0)
			return kill_and_reap(children, count, not_tried("fork"));
		children[count] = child;
	}
	struct timespec left = {.tv_sec = seconds, .tv_nsec = 0};
	while (nanosleep(&left, &left) != 0 && errno == EINTR)
		;
	return kill_and_reap(children, procs, MET);
}

static int usage(void)
{
	fputs("usage: sandbox-provoke memory BYTES | pids N | cpu SECONDS PROCS\n", stderr);
	return USAGE;
}

int main(int argc, char **argv)
{
	long first = argc >= 3 ? number(argv[2], LONG_MAX) : -1;
	long second = argc == 4 ? number(argv[3], PROCS_MAX) : -1;

	if (argc == 3 && strcmp(argv[1], "memory") == 0 && first > 0)
		return provoke_memory((size_t)first);
	if (argc == 3 && strcmp(argv[1], "pids") == 0 && first > 0 && first <= CHILDREN_MAX)
		return provoke_pids(first);
	if (argc == 4 && strcmp(argv[1], "cpu") == 0 && first > 0 && first <= SECONDS_MAX && second > 0)
		return provoke_cpu(first, second);
	return usage();
}
