/* A stand-in for libnvidia-ml.so.1. It has the functions that devices/nvml.py and benchmarks/cuda_split.py
 * call, and takes the machine's state from the text file that FAKE_NVML names, which it reads again at every call:
 *
 *   driver <code>               nvmlInit and every other call answer this; 0: the driver is there
 *   card <uuid> <total MiB> <used MiB> <utilisation %> <code> <name>
 *                               in NVML's order; utilisation -1: not supported; code: what reading the card answers
 *   process <uuid> <pid> <MiB>  -1: listed without its memory
 *   processes <code>            what listing processes answers
 *   xid <number> <uuid> <code>  told once; numbers rise
 *   hang <uuid>                 reading this card's memory does not return while this line stands
 *
 * As with the real one, a lost card (code 15) stays lost until the library is opened anew, and one that is lost then is
 * not found; once the driver was away, every call answers "uninitialized" until then. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7 };
enum { TIMED_OUT = 10, LOST = 15 };
enum { CARDS = 8, PROCESSES = 32, XIDS = 32, XID_EVENT = 8 };
#define MIB (1ull << 20)
#define NOT_AVAILABLE (~0ull)

typedef struct { char uuid[96], name[96]; long long total, used; int util, code, hangs; } Card;
typedef struct { char uuid[96]; unsigned pid; long long used; } Process;
typedef struct { long number; char uuid[96]; unsigned long long code; } Xid;
typedef struct { char uuid[96]; int is_found, is_lost; } Handle; /* what outlives one reading of the file */
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } ProcessInfo;
typedef struct { Handle *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } Event;

static Card cards[CARDS];
static Process processes[PROCESSES];
static Xid xids[XIDS];
static Handle handles[CARDS];
static int card_count, process_count, xid_count, handle_count, driver, processes_code, opened;
static long last_xid;

static Card *card_of(const char *uuid) {
    for (int i = 0; i < card_count; i++)
        if (!strcmp(cards[i].uuid, uuid)) return &cards[i];
    return NULL;
}

static void look(void) {
    char line[512], uuid[96];
    FILE *file = fopen(getenv("FAKE_NVML") ? getenv("FAKE_NVML") : "", "r");
    card_count = process_count = xid_count = driver = processes_code = 0;
    if (!file) { driver = 9; return; }
    while (fgets(line, sizeof line, file)) {
        Card card = {0};
        Process process = {0};
        Xid xid = {0};
        if (card_count < CARDS && sscanf(line, "card %95s %lld %lld %d %d %95[^\n]", card.uuid, &card.total, &card.used,
                                         &card.util, &card.code, card.name) == 6)
            cards[card_count++] = card;
        else if (process_count < PROCESSES &&
                 sscanf(line, "process %95s %u %lld", process.uuid, &process.pid, &process.used) == 3)
            processes[process_count++] = process;
        else if (xid_count < XIDS && sscanf(line, "xid %ld %95s %llu", &xid.number, xid.uuid, &xid.code) == 3)
            xids[xid_count++] = xid;
        else if (sscanf(line, "hang %95s", uuid) == 1 && card_of(uuid))
            card_of(uuid)->hangs = 1;
        else if (sscanf(line, "processes %d", &processes_code) != 1)
            sscanf(line, "driver %d", &driver);
    }
    fclose(file);
    if (driver) opened = 0;
}

static int state(void) {
    look();
    return driver ? driver : opened > 0 ? OK : UNINITIALIZED;
}

static Handle *handle_of(const char *uuid) {
    for (int i = 0; i < handle_count; i++)
        if (!strcmp(handles[i].uuid, uuid)) return &handles[i];
    if (handle_count == CARDS) return NULL;
    Handle *handle = &handles[handle_count++];
    snprintf(handle->uuid, sizeof handle->uuid, "%s", uuid);
    return handle;
}

/* The card behind a handle, or why it cannot be read. */
static int reach(Handle *handle, Card **card) {
    int code = state();
    if (code) return code;
    if (!handle || !handle->is_found || !(*card = card_of(handle->uuid))) return INVALID;
    if ((*card)->code == LOST) handle->is_lost = 1;
    return handle->is_lost ? LOST : (*card)->code;
}

static int text(char *to, unsigned size, const char *from) {
    if (strlen(from) >= size) return TOO_SMALL;
    strcpy(to, from);
    return OK;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    look();
    if (driver) return driver;
    if (opened++) return OK;
    for (int i = 0; i < card_count; i++) {
        Handle *handle = handle_of(cards[i].uuid);
        if (handle) handle->is_found = cards[i].code != LOST, handle->is_lost = 0;
    }
    return OK;
}

int nvmlShutdown(void) {
    int code = state();
    if (!code) opened--;
    return code;
}

const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : "Unknown Error"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    int code = state();
    if (code) return code;
    *count = 0;
    for (int i = 0; i < card_count; i++) *count += (unsigned)handle_of(cards[i].uuid)->is_found;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle **handle) {
    int code = state();
    if (code) return code;
    for (int i = 0; i < card_count; i++)
        if ((*handle = handle_of(cards[i].uuid))->is_found && index-- == 0) return OK;
    return INVALID;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Handle **handle) {
    int code = state();
    if (code) return code;
    if (!card_of(uuid) || !(*handle = handle_of(uuid))->is_found) return NOT_FOUND;
    return OK;
}

int nvmlDeviceGetUUID(Handle *handle, char *to, unsigned size) {
    Card *card;
    int code = reach(handle, &card);
    return code ? code : text(to, size, card->uuid);
}

int nvmlDeviceGetName(Handle *handle, char *to, unsigned size) {
    Card *card;
    int code = reach(handle, &card);
    return code ? code : text(to, size, card->name);
}

int nvmlSystemGetDriverVersion(char *to, unsigned size) {
    int code = state();
    return code ? code : text(to, size, "580.0");
}

int nvmlDeviceGetCudaComputeCapability(Handle *handle, int *major, int *minor) {
    Card *card;
    int code = reach(handle, &card);
    if (code) return code;
    *major = 8, *minor = 6;
    return OK;
}

int nvmlDeviceGetMemoryInfo(Handle *handle, Memory *memory) {
    Card *card;
    int code = reach(handle, &card);
    while (!code && card->hangs) {
        struct timespec pause = {0, 1000000};
        nanosleep(&pause, NULL);
        code = reach(handle, &card);
    }
    if (code) return code;
    memory->total = (unsigned long long)card->total * MIB;
    memory->used = (unsigned long long)card->used * MIB;
    memory->free = memory->total - memory->used;
    return OK;
}

int nvmlDeviceGetUtilizationRates(Handle *handle, Utilization *utilization) {
    Card *card;
    int code = reach(handle, &card);
    if (code) return code;
    if (card->util < 0) return NOT_SUPPORTED;
    utilization->gpu = (unsigned)card->util;
    utilization->memory = 0;
    return OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Handle *handle, unsigned *count, ProcessInfo *list) {
    Card *card;
    unsigned found = 0;
    int code = reach(handle, &card);
    if (code || processes_code) return code ? code : processes_code;
    for (int i = 0; i < process_count; i++) {
        if (strcmp(processes[i].uuid, handle->uuid)) continue;
        if (list && found < *count) {
            ProcessInfo info = {processes[i].pid, NOT_AVAILABLE, ~0u, ~0u};
            if (processes[i].used >= 0) info.used = (unsigned long long)processes[i].used * MIB;
            list[found] = info;
        }
        found++;
    }
    code = found > (list ? *count : 0) ? TOO_SMALL : OK;
    *count = found;
    return code;
}

int nvmlEventSetCreate(void **set) {
    *set = &last_xid;
    return state();
}

int nvmlEventSetFree(void *set) {
    (void)set;
    return state();
}

int nvmlDeviceRegisterEvents(Handle *handle, unsigned long long types, void *set) {
    Card *card;
    (void)set;
    int code = reach(handle, &card);
    return code ? code : types == XID_EVENT ? OK : NOT_SUPPORTED;
}

int nvmlEventSetWait_v2(void *set, Event *event, unsigned milliseconds) {
    (void)set, (void)milliseconds;
    int code = state();
    if (code) return code;
    for (int i = 0; i < xid_count; i++) {
        if (xids[i].number <= last_xid || !card_of(xids[i].uuid)) continue;
        last_xid = xids[i].number;
        *event = (Event){handle_of(xids[i].uuid), XID_EVENT, xids[i].code, ~0u, ~0u};
        return OK;
    }
    return TIMED_OUT;
}
