/*
 * Tries the system calls that a sandbox is to be refused, and some that it needs, and prints one line for each:
 *
 *     <name> <errno name, or ok>
 *
 * A call that is refused by the filter never reaches the kernel, so each is made with arguments that would give some
 * other error, or succeed, where it does: EPERM can only come from the filter or from a missing capability, and
 * those that need a capability are marked with a "!" after the name.
 *
 * Build: gcc -static -O2 -Wall -Wextra -Werror -o seccomp_probe seccomp_probe.c
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef AF_VSOCK
#define AF_VSOCK 40
#endif

static void report(const char *name, long result)
{
	const char *said = result >= 0 ? "ok" : strerrorname_np(errno);
	printf("%s %s\n", name, said != NULL ? said : "unknown");
	fflush(stdout);
}

/* A raw call with arguments that no kernel takes: -1 is no descriptor, 1 is no address. */
static void refused(const char *name, long number)
{
	report(name, syscall(number, -1L, 1L, -1L, 1L, -1L, 0L));
}

static void cloned(const char *name, unsigned long flags)
{
	long child = syscall(SYS_clone, flags | SIGCHLD, 0L, 0L, 0L, 0L);
	if (child == 0)
		_exit(0);
	report(name, child);
	if (child > 0)
		waitpid((pid_t)child, NULL, 0);
}

static void unshared(const char *name, int flags)
{
	pid_t child = fork();
	if (child == 0) {
		report(name, unshare(flags));
		_exit(0);
	}
	waitpid(child, NULL, 0);
}

static void sock(const char *name, long family, int type, int protocol)
{
	long fd = syscall(SYS_socket, family, (long)type, (long)protocol);
	report(name, fd);
	if (fd >= 0)
		close((int)fd);
}

static void request(const char *name, unsigned long number)
{
	char byte = 'x';
	report(name, syscall(SYS_ioctl, -1L, number, &byte));
}

static void *nothing(void *unused)
{
	return unused;
}

static void needed(void)
{
	pthread_t thread;
	int pair[2];
	int failure = pthread_create(&thread, NULL, nothing, NULL);
	if (failure == 0)
		pthread_join(thread, NULL);
	errno = failure;
	report("thread", failure == 0 ? 0 : -1);

	cloned("fork", 0);
	sock("socket_unix", AF_UNIX, SOCK_STREAM, 0);
	sock("socket_inet", AF_INET, SOCK_STREAM, 0);
	sock("socket_inet6", AF_INET6, SOCK_DGRAM, 0);
	sock("socket_netlink_route", AF_NETLINK, SOCK_RAW, 0);
	report("socketpair", socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	report("memfd_create", memfd_create("probe", 0));
	report("mmap_exec", mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
	       == MAP_FAILED ? -1 : 0);
	report("personality_query", personality(0xffffffff));
	report("prlimit64", syscall(SYS_prlimit64, 0L, 7L, NULL, NULL));
	request("ioctl_TCGETS", 0x5401UL);
	request("ioctl_TIOCGWINSZ", 0x5413UL);
	request("ioctl_TIOCSPGRP", 0x5410UL);
	request("ioctl_FICLONE", 0x40049409UL);
	request("ioctl_sign_extended", 0xffffffff80045430UL);
	report("mkfifo", syscall(SYS_mknodat, (long)AT_FDCWD, "/nowhere/fifo", (long)(S_IFIFO | 0600), 0L));

	pid_t child = fork();
	if (child == 0) {
		report("ptrace", ptrace(PTRACE_TRACEME, 0, NULL, NULL));
		_exit(0);
	}
	waitpid(child, NULL, 0);
}

static void namespaces(void)
{
	cloned("clone_NEWUSER", CLONE_NEWUSER);
	cloned("clone_NEWNS!", CLONE_NEWNS);
	cloned("clone_NEWPID!", CLONE_NEWPID);
	cloned("clone_NEWNET!", CLONE_NEWNET);
	cloned("clone_NEWUSER_high_bits", CLONE_NEWUSER | 0x100000000UL);
	unshared("unshare_NEWUSER", CLONE_NEWUSER);
	unshared("unshare_FS", CLONE_FS);
	refused("setns", SYS_setns);
	refused("clone3", SYS_clone3);
}

static void mounts(void)
{
	refused("mount!", SYS_mount);
	refused("umount2!", SYS_umount2);
	refused("pivot_root!", SYS_pivot_root);
	refused("chroot!", SYS_chroot);
	refused("open_tree", SYS_open_tree);
	refused("move_mount!", SYS_move_mount);
	refused("fsopen!", SYS_fsopen);
	refused("fsconfig", SYS_fsconfig);
	refused("fsmount!", SYS_fsmount);
	refused("fspick!", SYS_fspick);
	refused("mount_setattr!", SYS_mount_setattr);
	report("mknod_device!", syscall(SYS_mknodat, (long)AT_FDCWD, "/nowhere/device", (long)(S_IFCHR | 0600), 0L));
	refused("name_to_handle_at", SYS_name_to_handle_at);
	refused("open_by_handle_at!", SYS_open_by_handle_at);
}

static void machinery(void)
{
	refused("io_uring_setup", SYS_io_uring_setup);
	refused("io_uring_enter", SYS_io_uring_enter);
	refused("io_uring_register", SYS_io_uring_register);
	refused("keyctl", SYS_keyctl);
	refused("add_key", SYS_add_key);
	refused("request_key", SYS_request_key);
	refused("bpf", SYS_bpf);
	refused("perf_event_open", SYS_perf_event_open);
	refused("userfaultfd", SYS_userfaultfd);
	refused("vmsplice", SYS_vmsplice);
	refused("kcmp", SYS_kcmp);
	refused("fanotify_init", SYS_fanotify_init);
	refused("move_pages", SYS_move_pages);
	refused("mbind", SYS_mbind);
	refused("kexec_load!", SYS_kexec_load);
	refused("init_module!", SYS_init_module);
	refused("finit_module!", SYS_finit_module);
	refused("delete_module!", SYS_delete_module);
	refused("swapon!", SYS_swapon);
	refused("reboot!", SYS_reboot);
	refused("clock_settime!", SYS_clock_settime);
	refused("clock_adjtime", SYS_clock_adjtime);
	refused("settimeofday!", SYS_settimeofday);
	refused("acct!", SYS_acct);
	refused("quotactl", SYS_quotactl);
	refused("syslog!", SYS_syslog);
	report("personality_NO_RANDOMIZE", personality(0x0040000));
	sock("socket_alg", AF_ALG, SOCK_SEQPACKET, 0);
	sock("socket_vsock", AF_VSOCK, SOCK_STREAM, 0);
	sock("socket_packet!", AF_PACKET, SOCK_RAW, 0);
	sock("socket_netlink_netfilter", AF_NETLINK, SOCK_RAW, 12);
	sock("socket_alg_high_bits", 0x100000000L | AF_ALG, SOCK_SEQPACKET, 0);
	request("ioctl_TIOCSTI", 0x5412UL);
	request("ioctl_TIOCSTI_high_bits", 0x100005412UL);
	request("ioctl_TIOCLINUX", 0x541cUL);
}

int main(void)
{
	puts("# needed");
	needed();
	puts("# refused");
	namespaces();
	mounts();
	machinery();
	return 0;
}
