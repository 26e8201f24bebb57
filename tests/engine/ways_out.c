/*
 * Tries every way out of a network namespace that a program without privileges could try, and prints a line for each:
 * its name, and "ok" or the name of the errno.
 *
 *     ways_out ADDRESS PORT NAME   ADDRESS of the host, where PORT is served on every address of it, and the abstract
 *                                  Unix socket NAME listens
 *
 * Build: gcc -static -O2 -Wall -Wextra -Werror -o ways_out ways_out.c
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/rtnetlink.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum { PROTOCOL_SCTP = 132, PROTOCOL_UDPLITE = 136, PROTOCOL_MPTCP = 262, WAIT_S = 2 };

static in_port_t port;

static void report(const char *name, long result)
{
	printf("%s %s\n", name, result >= 0 ? "ok" : strerrorname_np(errno));
}

static int made(int family, int type, int protocol)
{
	int fd = socket(family, type, protocol);
	struct timeval wait = { .tv_sec = WAIT_S };
	if (fd >= 0)
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof(wait));
	return fd;
}

static struct sockaddr_storage place(const char *text, in_port_t number, socklen_t *size)
{
	struct sockaddr_storage storage = { 0 };
	struct sockaddr_in *v4 = (struct sockaddr_in *)&storage;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&storage;
	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(number);
		*size = sizeof(*v4);
	} else if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons(number);
		v6->sin6_scope_id = text[0] == 'f' ? if_nametoindex("lo") : 0;
		*size = sizeof(*v6);
	}
	return storage;
}

static void reach(const char *name, const char *text, int type, int protocol)
{
	socklen_t size = 0;
	struct sockaddr_storage to = place(text, port, &size);
	int fd = made(to.ss_family, type, protocol);
	report(name, fd < 0 ? -1 : connect(fd, (struct sockaddr *)&to, size));
}

static void tell(const char *name, const char *text, in_port_t number, int type, int protocol, int flags)
{
	static const char echo[16] = { 8 };  /* an ICMP echo request, where that is asked for */
	socklen_t size = 0;
	struct sockaddr_storage to = place(text, number, &size);
	int fd = made(to.ss_family, type, protocol), yes = 1;
	if (fd >= 0)
		setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &yes, sizeof(yes));
	report(name, fd < 0 ? -1 : sendto(fd, echo, sizeof(echo), flags | MSG_NOSIGNAL, (struct sockaddr *)&to, size));
}

/* A request to the kernel's routing, and its answer. */
static void change(const char *name, struct nlmsghdr *message)
{
	struct { struct nlmsghdr head; struct nlmsgerr error; char rest[256]; } answer = { 0 };
	int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	long result = fd < 0 ? -1 : send(fd, message, message->nlmsg_len, 0);
	if (result >= 0)
		result = recv(fd, &answer, sizeof(answer), 0);
	if (result >= 0 && answer.head.nlmsg_type == NLMSG_ERROR && answer.error.error != 0) {
		errno = -answer.error.error;
		result = -1;
	}
	report(name, result);
}

static void make_interface(void)
{
	struct { struct nlmsghdr head; struct ifinfomsg link; struct rtattr info; struct rtattr kind; char text[8]; } ask = {
		.head = { sizeof(ask), RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, 1, 0 },
		.info = { sizeof(struct rtattr) * 2 + 8, IFLA_LINKINFO },
		.kind = { sizeof(struct rtattr) + 5, IFLA_INFO_KIND },
		.text = "dummy",
	};
	change("interface", &ask.head);
}

static void make_route(void)
{
	struct { struct nlmsghdr head; struct rtmsg route; struct rtattr out; int index; } ask = {
		.head = { sizeof(ask), RTM_NEWROUTE, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, 2, 0 },
		.route = { .rtm_family = AF_INET, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_STATIC,
			   .rtm_scope = RT_SCOPE_LINK, .rtm_type = RTN_UNICAST },
		.out = { sizeof(struct rtattr) + sizeof(int), RTA_OIF },
		.index = (int)if_nametoindex("lo"),
	};
	change("route", &ask.head);
}

static long enter(const char *path)
{
	int fd = open(path, O_RDONLY);
	return fd < 0 ? -1 : setns(fd, CLONE_NEWNET);
}

static long tunnel(void)
{
	struct ifreq request = { .ifr_flags = IFF_TUN };
	int fd = open("/dev/net/tun", O_RDWR);
	return fd < 0 ? -1 : ioctl(fd, TUNSETIFF, &request);
}

static long abstract(const char *name)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + strlen(name));
	memcpy(to.sun_path + 1, name, strlen(name));
	return connect(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&to, size);
}

static long machine(void)
{
	struct sockaddr_vm to = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port };
	int fd = made(AF_VSOCK, SOCK_STREAM, 0);
	return fd < 0 ? -1 : connect(fd, (struct sockaddr *)&to, sizeof(to));
}

int main(int argc, char **argv)
{
	if (argc < 4 || argc > 5 || strlen(argv[3]) > 90)
		return 2;
	int far = argc == 4;
	const char *host = argv[1];
	char mapped[64];
	snprintf(mapped, sizeof(mapped), "::ffff:%s", host);
	port = (in_port_t)atoi(argv[2]);

	reach("host_loopback", "127.0.0.1", SOCK_STREAM, 0);
	reach("host_loopback_other", "127.9.9.9", SOCK_STREAM, 0);
	reach("host_loopback_ipv6", "::1", SOCK_STREAM, 0);
	reach("host_any", "0.0.0.0", SOCK_STREAM, 0);
	reach("host", host, SOCK_STREAM, 0);
	reach("host_mapped", mapped, SOCK_STREAM, 0);
	reach("host_multipath", host, SOCK_STREAM, PROTOCOL_MPTCP);
	reach("host_sctp", host, SOCK_STREAM, PROTOCOL_SCTP);
	tell("host_fast_open", host, port, SOCK_STREAM, 0, MSG_FASTOPEN);
	tell("host_datagram", host, port, SOCK_DGRAM, 0, 0);
	tell("host_udplite", host, port, SOCK_DGRAM, PROTOCOL_UDPLITE, 0);
	tell("name_server", host, 53, SOCK_DGRAM, 0, 0);
	tell("ping", host, 0, SOCK_DGRAM, IPPROTO_ICMP, 0);
	tell("raw_icmp", host, 0, SOCK_RAW, IPPROTO_ICMP, 0);
	tell("raw_ip", host, 0, SOCK_RAW, IPPROTO_RAW, 0);
	if (far) {
		tell("raw_ipv6", "2001:db8::1", 0, SOCK_RAW, IPPROTO_ICMPV6, 0);
		tell("broadcast", "255.255.255.255", port, SOCK_DGRAM, 0, 0);
		tell("multicast", "224.0.0.251", 5353, SOCK_DGRAM, 0, 0);
		tell("multicast_ipv6", "ff02::fb", 5353, SOCK_DGRAM, 0, 0);
		tell("ipv6", "2001:db8::1", port, SOCK_DGRAM, 0, 0);
		tell("link_local", "fe80::1", port, SOCK_DGRAM, 0, 0);
		tell("metadata", "169.254.169.254", 80, SOCK_DGRAM, 0, 0);
	}
	report("packet", socket(AF_PACKET, SOCK_RAW, 0));
	report("machine", machine());
	report("abstract", abstract(argv[3]));
	report("tunnel", tunnel());
	make_interface();
	make_route();
	report("namespace_of_init", enter("/proc/1/ns/net"));
	report("namespace_of_another", enter("/proc/2/ns/net"));
	report("new_user", unshare(CLONE_NEWUSER | CLONE_NEWNET));
	return 0;
}
