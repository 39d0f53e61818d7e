// Loaded into NNI's Node processes before their own code (node --require). NNI 3.0 serves its REST interface and its
// web UI on every network interface without asking who is there, serves any file the user can read, and executes what
// is posted to it. Here it listens on the loopback address, and answers only its own user and only requests that name it.
//
// GLIOMA_NAS_NNI_HOST: address to answer at, 127.0.0.1 unless set; at another one, anybody who reaches it is served.
'use strict';

const net = require('net');
const http = require('http');
const fs = require('fs');
const os = require('os');
const path = require('path');
const Module = require('module');

const script = process.argv[1] || '';
const ESTABLISHED = '01';
const TUNER_SECONDS = 90;

// NODE_OPTIONS reaches every Node program that the user starts from the same shell; only NNI's are meant.
if (script.includes('nni_node')) {
    const host = process.env.GLIOMA_NAS_NNI_HOST || '127.0.0.1';
    const loopback = host.startsWith('127.') || host === '::1';
    if (loopback) {
        bindTo(host);
        refuseOtherUsers();
        refuseOtherNames();
    } else {
        // NNI's own parts talk to each other through localhost, so it must listen there as well.
        bindTo(host.includes(':') ? '::' : '0.0.0.0');
        acceptAt(host);
    }
    mendOnLoad(host);
}

function bindTo(address) {
    const listen = net.Server.prototype.listen;
    net.Server.prototype.listen = function (...args) {
        const first = args[0];
        if (first !== null && typeof first === 'object') {
            if (first.port !== undefined) {
                args[0] = { ...first, host: address };
            }
            return listen.apply(this, args);
        }
        const isPath = typeof first === 'string' && Number.isNaN(Number(first));
        if (isPath) {
            return listen.apply(this, args);
        }
        const callback = args.find((item) => typeof item === 'function');
        const options = { port: typeof first === 'function' || first === undefined ? 0 : Number(first), host: address };
        const backlog = args.slice(1).find((item) => typeof item === 'number');
        if (backlog !== undefined) {
            options.backlog = backlog;
        }
        return callback ? listen.call(this, options, callback) : listen.call(this, options);
    };
}

function acceptAt(address) {
    const anywhere = address === '0.0.0.0' || address === '::';
    const emit = net.Server.prototype.emit;
    net.Server.prototype.emit = function (event, socket, ...rest) {
        if (event === 'connection' && socket instanceof net.Socket && socket.localAddress !== undefined) {
            const local = socket.localAddress.replace(/^::ffff:/, '');
            if (local !== address && local !== '::1' && !local.startsWith('127.') && !anywhere) {
                socket.destroy();
                return true;
            }
        }
        return emit.call(this, event, socket, ...rest);
    };
}

// Any user of a shared machine can connect to a loopback port. The kernel knows whose the other end is.
function refuseOtherUsers() {
    if (process.platform !== 'linux') {
        return;
    }
    const own = process.getuid();
    const emit = net.Server.prototype.emit;
    net.Server.prototype.emit = function (event, socket, ...rest) {
        if (event === 'connection' && socket instanceof net.Socket && socket.remotePort !== undefined) {
            const user = userOf(socket);
            if (user !== own && user !== 0) {
                socket.destroy();
                return true;
            }
        }
        return emit.call(this, event, socket, ...rest);
    };
}

// Both ends are compared whole: another user may take the port of one's own connection at another loopback address. And
// only an open connection tells whose it is: the kernel shows one whose program has closed it already as root's.
function userOf(socket) {
    const ends = [
        endsOf(socket.remoteAddress, socket.remotePort),
        endsOf(socket.localAddress, socket.localPort),
    ];
    for (const table of ['/proc/net/tcp', '/proc/net/tcp6']) {
        let text;
        try {
            text = fs.readFileSync(table, 'utf8');
        } catch (error) {
            continue;
        }
        for (const line of text.split('\n').slice(1)) {
            const columns = line.trim().split(/\s+/);
            if (columns.length > 7 && columns[3] === ESTABLISHED
                && ends[0].includes(columns[1]) && ends[1].includes(columns[2])) {
                return Number(columns[7]);
            }
        }
    }
    return null;
}

// How the kernel writes one end: address as 32-bit words in the processor's own order of bytes, then the port.
function endsOf(address, port) {
    const hexPort = ':' + port.toString(16).toUpperCase().padStart(4, '0');
    const little = os.endianness() === 'LE';
    const word = (bytes) => Buffer.from(little ? bytes.slice().reverse() : bytes).toString('hex').toUpperCase();
    const none = '00000000';
    if (address === '::1') {
        return [none + none + none + word([0, 0, 0, 1]) + hexPort];
    }
    const four = word((address || '').replace(/^::ffff:/, '').split('.').map(Number));
    return [four + hexPort, none + none + word([0, 0, 255, 255]) + four + hexPort];
}

// A web page that the user visits can make the browser send requests to loopback ports: under a name of its own that
// resolves to 127.0.0.1, or from its own origin. Both show in the headers.
function refuseOtherNames() {
    const emit = http.Server.prototype.emit;
    http.Server.prototype.emit = function (event, request, response, ...rest) {
        if ((event === 'request' || event === 'upgrade') && !isLocal(request.headers)) {
            if (event === 'request') {
                response.writeHead(403, { 'Content-Type': 'text/plain' });
                response.end('refused: this NNI experiment answers to localhost only\n');
            } else {
                response.destroy();
            }
            return true;
        }
        return emit.call(this, event, request, response, ...rest);
    };
}

function isLocal(headers) {
    const names = ['localhost', '127.0.0.1', '[::1]'];
    const nameOf = (authority) => (authority || '').toLowerCase().replace(/:\d+$/, '');
    if (!names.includes(nameOf(headers.host))) {
        return false;
    }
    if (headers.origin === undefined) {
        return true;
    }
    const match = /^https?:\/\/(.+)$/.exec(headers.origin);
    // The web UI itself, not what another program, maybe another user's, shows at another port.
    return match !== null && match[1].toLowerCase() === headers.host.toLowerCase();
}

function mendOnLoad(host) {
    const mended = new Set();
    const load = Module._load;
    Module._load = function (request, ...rest) {
        const loaded = load.call(this, request, ...rest);
        const service = /(^|\/)v3\/compat$/.test(request) && loaded.V3asV1;
        if (service && !mended.has(service)) {
            mended.add(service);
            keepEarlyStop(service);
            giveEachTrialItsOwn(service);
            showTrialsRecords(service);
        }
        const tuner = /(^|\/)tuner_command_channel$/.test(request) && loaded.getTunerServer;
        if (tuner && !mended.has(tuner)) {
            mended.add(tuner);
            waitForTuner(loaded.getTunerServer());
        }
        const board = /(^|\/)nniTensorboardManager$/.test(request) && loaded.NNITensorboardManager;
        if (board && !mended.has(board)) {
            mended.add(board);
            bindTensorBoard(board, host);
        }
        return loaded;
    };
}

// NNI 3.0 gives its tuner, a Python process of its own, ten seconds to import what it needs, which a busy machine or a slow
// disk does not manage (core/tuner_command_channel.js, init). The experiment then stands still with state ERROR.
function waitForTuner(server) {
    server.init = function () {
        const told = () => new Error(`the tuner did not start within ${TUNER_SECONDS} s; see dispatcher.log`);
        const timer = setTimeout(() => this.connect.settled || this.connect.reject(told()), TUNER_SECONDS * 1000);
        return this.connect.promise.finally(() => clearTimeout(timer));
    };
}

// NNI 3.0 notes that an assessor stopped a trial only after the trial has ended, so that it shows as canceled by the
// user (training_service/v3/compat.js, cancelTrialJob).
function keepEarlyStop(service) {
    const cancel = service.prototype.cancelTrialJob;
    service.prototype.cancelTrialJob = async function (trialId, isEarlyStopped) {
        if (this.trialJobs[trialId]) {
            this.trialJobs[trialId].isEarlyStopped = Boolean(isEarlyStopped);
        }
        return cancel.call(this, trialId, isEarlyStopped);
    };
}

// NNI 3.0 looks for TensorBoard's records in a folder that no trial writes to (the same file, getTrialOutputLocalPath).
function showTrialsRecords(service) {
    const folderOf = service.prototype.getTrialOutputLocalPath;
    service.prototype.getTrialOutputLocalPath = async function (trialId) {
        const folder = (this.trialJobs[trialId] || {}).url;  // HOST:PATH for a trial on another machine
        return folder && path.isAbsolute(folder) ? folder : folderOf.call(this, trialId);
    };
}

// NNI 3.0 starts TensorBoard, a program of its own, on every network interface (extensions/nniTensorboardManager.js).
function bindTensorBoard(manager, host) {
    const commandOf = manager.prototype.getTensorboardStartCommand;
    manager.prototype.getTensorboardStartCommand = async function (...args) {
        const command = await commandOf.apply(this, args);
        return [...command.map((part) => part.replace('--bind_all ', '')), `--host=${host}`];
    };
}

// NNI 3.0 hands the oldest waiting parameters to whichever trial asks first, so that trials which start together can get
// each other's, and the web UI and the export show results beside the wrong ones (the same file, onRequestParameter).
function giveEachTrialItsOwn(service) {
    const submit = service.prototype.submitTrialJob;
    service.prototype.submitTrialJob = async function (form) {
        if (!this.ownParameters) {
            this.ownParameters = new Map();
            const create = this.v3.createTrial.bind(this.v3);
            this.v3.createTrial = async (environment, command, directory, sequence, id) => {
                const own = id ?? Math.random().toString(36).slice(2, 7).padEnd(5, '0');
                if (id === undefined && this.ownParameters.has(sequence)) {
                    const value = this.ownParameters.get(sequence);
                    this.allocatedParameters.set(own, value);
                    const waiting = this.parameters.indexOf(value);
                    if (waiting >= 0) {
                        this.parameters.splice(waiting, 1);
                    }
                }
                return create(environment, command, directory, sequence, own);
            };
        }
        this.ownParameters.set(form.sequenceId, form.hyperParameters.value);
        return submit.call(this, form);
    };
}
